"""Write the sample rows again, byte for byte: `python tools/sample_rows`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fintune.sample import rows_path
from sample_rows.rows import write_rows

write_rows(rows_path())
