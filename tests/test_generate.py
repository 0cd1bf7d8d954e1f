"""Batched generation gives what one-by-one generation gives, and stops where it should."""

import pytest
import torch
from tiny_release import tiny_adapter, tiny_base

from fintune import attention, generate, model
from fintune.errors import NotFinite
from fintune.generate import Prompt, answer_all


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tiny_base(tmp_path_factory.mktemp("base") / "base")
    base = model.Base("fintune/tiny", "0", folder)
    tokenizer = model.load_tokenizer(base)
    loaded = model.load_base(base, "none", "fp32", attention=attention.NAME).eval()
    return base, tokenizer, loaded, model.end_token_ids(base, tokenizer)


def prompts(count=12):
    draw = torch.Generator().manual_seed(3)
    sizes = torch.randint(3, 40, (count,), generator=draw).tolist()
    return [Prompt(f"p{at}", torch.randint(40, 250, (size,), generator=draw).tolist())
            for at, size in enumerate(sizes)]  # fmt: skip


def one_by_one(loaded, ids, limit, ends):
    out = loaded.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=limit, do_sample=False, eos_token_id=ends, pad_token_id=0,
    )  # fmt: skip
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("batch", [1, 5, 12])
def test_batched_equals_one_by_one(tiny, batch):
    _, _, loaded, ends = tiny
    rows = [prompt.ids for prompt in prompts()]
    # Ends that a random model meets now and then, so that rows leave the batch at different times.
    stops = sorted({token for ids in rows for token in one_by_one(loaded, ids, 20, ends)[6:8]})[:6]
    wanted = [one_by_one(loaded, ids, 90, stops) for ids in rows]
    made = []
    for at in range(0, len(rows), batch):
        made += generate._greedy(loaded, rows[at : at + batch], frozenset(stops), 90)
    assert made == wanted
    assert len({len(row) for row in made}) > 2, "the rows should end at different times"


def test_every_end_token_of_the_list_stops(tiny):
    _, tokenizer, loaded, _ = tiny
    ids = prompts()[0].ids
    free = one_by_one(loaded, ids, 12, [0])
    for end in (free[2], free[5]):
        (batch,) = answer_all(
            loaded, tokenizer, [Prompt("a", ids)], ends=[4000, end], max_new_tokens=12, batch_size=4
        )
        assert batch[0].tokens == free.index(end) + 1 and batch[0].finish == "stop"


def test_greedy_whatever_the_base_says(tiny):
    _, tokenizer, loaded, ends = tiny
    settings = {"ends": ends, "max_new_tokens": 10, "batch_size": 4}
    before = [list(b) for b in answer_all(loaded, tokenizer, prompts(4), **settings)]
    loaded.generation_config.do_sample, loaded.generation_config.temperature = True, 5.0
    torch.manual_seed(1)
    assert [list(b) for b in answer_all(loaded, tokenizer, prompts(4), **settings)] == before


def test_adapter_off_is_the_base_and_on_is_not(tiny, tmp_path):
    base, _, loaded, ends = tiny
    rows = [prompt.ids for prompt in prompts(4)]
    plain = generate._greedy(loaded, rows, frozenset(ends), 12)
    tiny_adapter(base.folder, tmp_path / "adapter")
    fresh = model.load_base(base, "none", "fp32", attention=attention.NAME)
    both = model.load_adapter(fresh, tmp_path / "adapter")
    with both.disable_adapter():
        assert generate._greedy(both, rows, frozenset(ends), 12) == plain
    assert generate._greedy(both, rows, frozenset(ends), 12) != plain


def test_logits_that_are_not_finite_are_an_error(tiny):
    base, tokenizer, _, ends = tiny
    broken = model.load_base(base, "none", "fp32")
    broken.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(NotFinite):
        list(answer_all(broken, tokenizer, prompts(2), ends=ends, max_new_tokens=2, batch_size=2))
