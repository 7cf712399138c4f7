"""Cut a student of fewer blocks out of a model, teach it, and say what that costs and brings.

python examples/distil_a_smaller_model.py OUT [--teacher MODEL] [--data TEXT] [--layers 4] [--steps 20]
"""

import argparse
from pathlib import Path

from calib import embedded
from parewell import Distill, distill

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("out", type=Path)
parser.add_argument("--teacher", default=str(embedded.MODEL))
parser.add_argument("--data", type=Path, help="text to teach with; default: the embedded text")
parser.add_argument("--layers", type=int, default=4)
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()

options = Distill(
    layers=args.layers, data=args.data, loss="0.5*ce+0.5*forward-kl", steps=args.steps, length=128, samples=32
)
report = distill(args.teacher, args.out, options)
weights = report["parameters"]
print(f"{weights['student']:,} weights instead of {weights['teacher']:,}")
for stage, quality in report["quality_by_stage"].items():
    print(
        f"{stage}: perplexity {quality['perplexity']:.2f}, {quality['top1_agreement']:.1%} of the top tokens the same"
    )
