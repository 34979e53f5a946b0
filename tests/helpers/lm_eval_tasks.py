"""Tasks of the lm-evaluation-harness with made-up data."""

from __future__ import annotations

import json
from pathlib import Path

ROWS = [
    {"q": f"{a} and {b} are", "choices": [x, y, "much else"], "gold": i % 2}
    for i, (a, b, x, y) in enumerate(
        [("one", "two", "three", "many words"), ("cat", "dog", "pets", "x"), ("up", "down", "ways", "far away")]
    )
]


def write_task(directory: Path) -> Path:
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (directory / "quiz.yaml").write_text(
        f"task: quiz\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {directory / 'rows.jsonl'}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{q}}'\ndoc_to_choice: choices\n"
        "doc_to_target: gold\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    (directory / "say.yaml").write_text(
        f"task: say\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {directory / 'rows.jsonl'}\n"
        "output_type: generate_until\ntest_split: test\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{choices[0]}}'\n"
        "generation_kwargs:\n  until: ['\\n']\n  max_gen_toks: 5\nmetric_list:\n  - metric: exact_match\n"
    )
    (directory / "text.yaml").write_text(
        f"task: text\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {directory / 'rows.jsonl'}\n"
        "output_type: loglikelihood_rolling\ntest_split: test\ndoc_to_text: ''\ndoc_to_target: '{{q}}'\n"
        "metric_list:\n  - metric: bits_per_byte\n"
    )
    return directory
