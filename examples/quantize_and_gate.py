"""Quantize a model and let it through only if it still says what it said.

    python examples/quantize_and_gate.py OUT [--model MODEL] [--data TEXT] [--scheme w4a16-channel] [--agreement 0.8]

What a deployment pipeline would run: exit status 1 where the quantized model agrees too seldom with the original.
"""

import argparse
import sys
from pathlib import Path

import torch

from calib import embedded
from parewell import Quantize, load, quantize

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("out", type=Path)
parser.add_argument("--model", default=str(embedded.MODEL))
parser.add_argument("--data", type=Path, help="text to calibrate on; default: the embedded text")
parser.add_argument("--scheme", default="w4a16-channel")
parser.add_argument("--agreement", type=float, default=0.8, help="share of top tokens that must stay the same")
args = parser.parse_args()

options = Quantize.preset("fast", scheme=args.scheme, data=args.data, samples=16, held_out=16, length=128)
quality = quantize(args.model, args.out, options)["quality"]
print(f"perplexity {quality['perplexity']:.3f}, float {quality['reference_perplexity']:.3f}")
if quality["top1_agreement"] < args.agreement:
    sys.exit(f"only {quality['top1_agreement']:.1%} of the top tokens are the same; {args.out} is not let through")

model = load(args.out)
with torch.no_grad():
    logits = model(torch.arange(1, 17)[None]).logits
print(f"let through: {quality['top1_agreement']:.1%} of the top tokens are the same; it answers {tuple(logits.shape)}")
