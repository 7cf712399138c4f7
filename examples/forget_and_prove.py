"""Make a model forget some of the text that it was trained on, and compare what it knew and what it knows.

    python examples/forget_and_prove.py OUT

The embedded model was trained on Python's language reference. Here it forgets what that says of lambda and yield.
"""

import argparse
import json
from pathlib import Path

from calib import embedded
from parewell import Unlearn, unlearn

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("out", type=Path)
args = parser.parse_args()

rows = [
    {"prompt": text[:80], "response": text[80:500], "about": "functions" if "yield" in text or "lambda" in text else ""}
    for text in embedded.python_topics("train")
    if len(text) > 200
]
train = args.out.with_name(args.out.name + "-rows.jsonl")
train.write_text("".join(json.dumps(row) + "\n" for row in rows))

options = Unlearn(
    train=train, forget_where="about=functions", method="npo", epochs=3, lr=3e-4, retain_multiplier=3.0, length=256
)
report = unlearn(embedded.MODEL, args.out, options)
for group in ("forget", "retain"):
    before, after = (report["quality_by_stage"][stage][group]["nats"] for stage in ("before", "after"))
    print(f"{group}: {before:.3f} nats a token before, {after:.3f} after")
print(f"figures, distributions and the recipe: {args.out / 'report.html'}")
