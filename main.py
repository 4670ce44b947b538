"""Train a video forecaster: `python main.py --dataset kth --interpolant follmer`. See README.md."""

from __future__ import annotations

import argparse
import json

import configs
import interpolants
import stages
import train
from branches import DATASETS
from console import run_command


def main() -> None:
    parser = argparse.ArgumentParser(prog="python main.py", description="Train a video forecaster and sample from it. "
                                     "The same command run again goes on where the last one stopped.")
    parser.add_argument("--dataset", default="ball_stn", help=", ".join(DATASETS))
    parser.add_argument("--interpolant", default="follmer", help=", ".join(interpolants.TABLE))
    parser.add_argument("--overfit", type=int, choices=(0, 1), default=0, help="1: learn one batch of clips by heart")
    parser.add_argument("--ckpt", help="a checkpoint whose weights to start from")
    parser.add_argument("--wandb_entity", default="")
    parser.add_argument("--wandb_project", default="driftcast")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="GROUP.FIELD=VALUE",
                        help="any other field of configs.py, e.g. train.steps=5000 model.width=192")
    parser.add_argument("--dry_run", type=int, choices=(0, 1), default=0, help="1: print the merged config and the plan")
    args = parser.parse_args()
    flags = {"flow.interpolant": args.interpolant, "train.overfit": bool(args.overfit),
             "wandb.entity": args.wandb_entity, "wandb.project": args.wandb_project}
    config = configs.build(args.dataset, flags | configs.parse_overrides(args.set))
    if args.dry_run:
        print(json.dumps(configs.to_dict(config), indent=1))
        print("\n".join(stages.plan(config)))
        return
    train.run(config, args.ckpt)


if __name__ == "__main__":
    run_command(main)
