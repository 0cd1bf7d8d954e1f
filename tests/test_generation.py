"""Continuous batching gives what transformers' one-by-one generation gives, and stops in place."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_release import tiny_adapter, tiny_base
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    Lfm2Config,
    Qwen2Config,
    Qwen2MoeConfig,
)

from fintune import model
from fintune.chat import ChatFormat
from fintune.config import ChatConfig
from fintune.errors import NotFinite
from fintune.evals.likelihood import Labelled, log_likelihoods
from fintune.generation import Batch, Request, generate, sample
from fintune.untrusted.probe import stop_token_ids

Tiny = tuple[model.Base, Any, Any, list[int]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tiny_base(tmp_path_factory.mktemp("base") / "base")
    base = model.Base("fintune/tiny", "0", folder)
    tokenizer = model.load_tokenizer(base)
    loaded = model.load_base(base, "none", "fp32").eval()
    return base, tokenizer, loaded, stop_token_ids(base.folder, tokenizer)


def prompts(count: int = 12) -> list[list[int]]:
    draw = torch.Generator().manual_seed(3)
    sizes = torch.randint(3, 40, (count,), generator=draw).tolist()
    return [torch.randint(40, 250, (size,), generator=draw).tolist() for size in sizes]


def requests(rows: list[list[int]], limit: int, **more: Any) -> list[Request]:
    return [Request(f"p{at:02}", ids, limit, **more) for at, ids in enumerate(rows)]


def answers(
    tiny: Tiny, rows: list[list[int]], limit: int, *, loaded: Any = None, **more: Any
) -> list[list[int]]:
    """Generated ids of each prompt, in the order of the prompts."""
    settings = {"stop_token_ids": tiny[3], "batch_size": 4} | more
    parts = generate(
        loaded or tiny[2], ChatFormat(tiny[1], ChatConfig()), requests(rows, limit), **settings
    )
    return [found.token_ids for found in sorted(sum(parts, []), key=lambda found: found.id)]


def test_a_shared_prefix_is_computed_once(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tasks of ten prompts each: fewer tokens pass the model, the answers are the same."""
    first, second = prompts(50)[:2], prompts(20)
    tasks = [ids * (1 + 80 // len(ids)) for ids in first]
    rows = [tasks[at % 2] + ids for at, ids in enumerate(second)]
    seen: list[int] = []

    def counted(module: Any, args: Any, given: Any) -> None:
        seen.append(given["input_ids"].numel() if given["input_ids"].shape[1] > 1 else 0)

    hook = tiny[2].register_forward_pre_hook(counted, with_kwargs=True)
    shared = answers(tiny, rows, 12)
    tokens = sum(seen)
    monkeypatch.setattr(Batch, "share_prefix", lambda batch, prompts: None)
    assert shared == answers(tiny, rows, 12)
    hook.remove()
    assert tokens < 0.5 * (sum(seen) - tokens)
    assert shared == [one_by_one(tiny[2], ids, 12, tiny[3]) for ids in rows]


@pytest.mark.parametrize("tokens", [100, 2048])
def test_choices_in_one_pass_have_the_likelihood_that_each_has_alone(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    """Questions of several lengths behind two shared prefixes, in one pass or in two, or behind
    none; choices of one token and of several."""
    monkeypatch.setattr("fintune.evals.likelihood.PREFILL_TOKENS", tokens)
    one, two = (ids * 60 for ids in prompts(2))
    rows = [[one[:50], two[:60], []][at % 3] + ids for at, ids in enumerate(prompts(9))]
    choices = ((50, 3), (60, 61, 62, 3), (70, 3))
    questions = [Labelled(f"{n}", ids, ("a", "b", "c"), choices) for n, ids in enumerate(rows)]
    found = [pair for part in log_likelihoods(tiny[2], questions) for pair in part]
    for question, scores in found:
        for ids, score in zip(choices, scores, strict=True):
            whole = torch.tensor([[*question.prompt_ids, *ids]])
            likely = tiny[2](whole).logits.log_softmax(-1)[0, len(question.prompt_ids) - 1 : -1]
            alone = likely.gather(-1, torch.tensor(ids)[:, None]).sum()
            assert score == pytest.approx(float(alone), abs=1e-4)
    assert len(found) == 9


def test_a_long_prompt_makes_no_batch_of_long_rows(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys are bounded in tokens, padding included, whatever the batch size; the answers stay."""
    monkeypatch.setattr("fintune.generation.CACHE_TOKENS", 300)
    rows, kept = [prompts(1)[0] * 200, *prompts()], list[int]()
    rows[0] = rows[0][:200]
    step = Batch.step

    def noted(batch: Batch) -> list[Request]:
        kept.append(len(batch.requests) * (batch.width + 1))
        return step(batch)

    monkeypatch.setattr(Batch, "step", noted)
    assert answers(tiny, rows, 20, batch_size=12) == [
        one_by_one(tiny[2], ids, 20, tiny[3]) for ids in rows
    ]
    assert max(kept) <= 300 and max(kept) > 200


def one_by_one(loaded: Any, ids: list[int], limit: int, ends: list[int]) -> list[int]:
    out = loaded.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=limit, do_sample=False, eos_token_id=ends, pad_token_id=0,
    )  # fmt: skip
    made: list[int] = out[0, len(ids) :].tolist()
    return made


@pytest.mark.parametrize("size", [1, 5, 12])
def test_batched_equals_one_by_one(tiny: Tiny, size: int) -> None:
    _, _, loaded, ends = tiny
    rows = prompts()
    # Ends that a random model meets now and then, so that rows leave the batch at different times.
    stops = sorted({token for ids in rows for token in one_by_one(loaded, ids, 20, ends)[6:8]})[:6]
    wanted = [one_by_one(loaded, ids, 90, stops) for ids in rows]
    made = answers(tiny, rows, 90, stop_token_ids=stops, batch_size=size)
    assert made == wanted
    assert len({len(row) for row in made}) > 2, "the rows should end at different times"


SHAPE = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.3,
    "sliding_window": 16, "max_position_embeddings": 256,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["qwen2", "gemma3", "lfm2"])
def test_layers_of_other_architectures(tiny: Tiny, kind: str) -> None:
    """Layers that attend to the last 16 tokens alone, or convolve, mixed with full ones."""
    other = "conv" if kind == "lfm2" else "sliding_attention"
    types = {"qwen2": Qwen2Config, "gemma3": Gemma3TextConfig, "lfm2": Lfm2Config}
    torch.manual_seed(0)
    layers = [other, "full_attention"] * 2
    config = types[kind](**SHAPE, layer_types=layers, use_sliding_window=True)
    loaded = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    wanted = [one_by_one(loaded, ids, 40, [0]) for ids in prompts()]
    assert answers(tiny, prompts(), 40, loaded=loaded, stop_token_ids=[0]) == wanted


def test_every_end_token_of_the_list_stops(tiny: Tiny) -> None:
    _, tokenizer, loaded, _ = tiny
    ids = prompts()[0]
    free = one_by_one(loaded, ids, 12, [0])
    chat = ChatFormat(tokenizer, ChatConfig())
    for end in (free[2], free[5]):
        ((found,),) = generate(
            loaded,
            chat,
            requests([ids], 12),
            stop_token_ids=[4000, end],
            batch_size=4,
        )
        assert len(found.token_ids) == free.index(end) + 1 and found.finish_reason == "stop"


def test_greedy_whatever_the_base_says(tiny: Tiny) -> None:
    loaded = tiny[2]
    before = answers(tiny, prompts(4), 10)
    loaded.generation_config.do_sample, loaded.generation_config.temperature = True, 5.0
    torch.manual_seed(1)
    assert answers(tiny, prompts(4), 10) == before
    loaded.generation_config.do_sample = False


def test_base_and_adapter_share_a_batch(tiny: Tiny, tmp_path: Path) -> None:
    """The base's answers with the adapter off are those of `adapter=False` beside the adapter's."""
    base, _, loaded, ends = tiny
    rows = prompts(6)
    plain = answers(tiny, rows, 12)
    tiny_adapter(base.folder, tmp_path / "adapter")
    fresh = model.load_base(base, "none", "fp32")
    peft_model = model.load_adapter(fresh, tmp_path / "adapter")
    with peft_model.disable_adapter():
        assert answers(tiny, rows, 12, loaded=peft_model) == plain
    adapted = answers(tiny, rows, 12, loaded=peft_model)
    assert all(one != other for one, other in zip(plain, adapted, strict=True))
    mixed = requests(rows, 12, adapter=False) + requests(rows, 12)
    batch = Batch(peft_model, ends)
    batch.add(mixed[3:9])  # both kinds at once, and others join later
    batch.step()
    batch.add(mixed[:3] + mixed[9:])
    while batch.requests:
        batch.step()
    assert [request.token_ids for request in mixed] == plain + adapted


def test_layers_that_see_all_rows_in_one_dimension_know_whose_a_token_is(tiny: Tiny) -> None:
    """The shared expert of a mixture: its tokens are no longer in rows."""
    torch.manual_seed(0)
    experts = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    base = AutoModelForCausalLM.from_config(Qwen2MoeConfig(**SHAPE | experts)).eval()
    settings = LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False)
    peft_model = get_peft_model(base, settings).eval()
    mixed = requests(prompts(3), 8) + requests(prompts(3), 8, adapter=False)
    batch = Batch(peft_model, [0])
    batch.add(mixed)
    while batch.requests:
        batch.step()
    adapted = answers(tiny, prompts(3), 8, loaded=peft_model, stop_token_ids=[0])
    with peft_model.disable_adapter():
        plain = answers(tiny, prompts(3), 8, loaded=peft_model, stop_token_ids=[0])
    assert [request.token_ids for request in mixed] == adapted + plain
    assert adapted != plain


def test_a_cancelled_row_leaves_and_changes_no_other(tiny: Tiny) -> None:
    rows = prompts(4)
    wanted = answers(tiny, rows, 20)
    asked, batch = requests(rows, 20), Batch(tiny[2], tiny[3])
    batch.add(asked)
    asked[1].cancelled = True
    assert asked[1] in batch.step()
    while batch.requests:
        batch.step()
    assert [asked[at].token_ids for at in (0, 2, 3)] == [wanted[at] for at in (0, 2, 3)]


def test_a_nucleus_of_one_token_is_greedy() -> None:
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    asked = [Request("", [1], 1, temperature=3.0, top_p=1e-6, seed=seed) for seed in range(8)]
    assert sample(logits, asked).tolist() == logits.argmax(-1).tolist()
    for request in asked:
        request.top_p = 1.0
    assert sample(logits, asked).tolist() != logits.argmax(-1).tolist()


def test_logits_that_are_not_finite_are_an_error(tiny: Tiny) -> None:
    broken = model.load_base(tiny[0], "none", "fp32")
    broken.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(NotFinite):
        answers(tiny, prompts(2), 2, loaded=broken)
