"""What a training step costs on many GPUs: operations, bytes sent and memory per rank, and the optimizer's share.

    python scripts/plan_scale.py --preset blueberry-88m --world_size 8 64 1024 --gpus_per_node 8 --bandwidth 50

Sequences are as long as the model takes. Times are operations and bytes over the rates given, one after the other:
what overlaps takes less.
"""

from argparse import Namespace

import torch

from blueberry.errors import OneLineParser, UsageError, run_script

HEADER = ("engine", "ranks", "optimizer GFLOP", "optimizer MB sent", "weights and gradients MB sent", "memory MiB",
          "optimizer's share of the step")  # fmt: skip


def main() -> None:
    from blueberry import BlueberryConfig, BlueberryForCausalLM
    from blueberry.training.scale import ENGINES, model_flops, plan

    arguments = parse_arguments()
    with torch.device("meta"):
        model = BlueberryForCausalLM(BlueberryConfig.from_preset(arguments.preset))
    print("| " + " | ".join(HEADER) + " |\n" + "|---" * len(HEADER) + "|")
    flops = model_flops(model, arguments.tokens, model.config.max_position_embeddings)
    for engine in ENGINES:
        for ranks in arguments.world_size:
            planned = plan(model, engine, ranks, sharing=arguments.gpus_per_node)
            print(row(engine, ranks, planned, flops, arguments))


def parse_arguments() -> Namespace:
    from blueberry.configuration_blueberry import PRESETS

    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="blueberry-88m", choices=sorted(PRESETS))
    parser.add_argument("--world_size", type=int, nargs="+", default=[1, 8, 64, 1024])
    parser.add_argument("--gpus_per_node", type=int, default=8)
    parser.add_argument("--bandwidth", type=float, default=50.0, help="GB/s that a GPU sends to other nodes")
    parser.add_argument("--node_bandwidth", type=float, default=300.0, help="GB/s that a GPU sends within its node")
    parser.add_argument("--tflops", type=float, default=400.0, help="of a GPU's matrix products, as reached")
    parser.add_argument("--tokens", type=int, default=16384, help="per GPU and step")
    arguments = parser.parse_args()
    for name in ("gpus_per_node", "bandwidth", "node_bandwidth", "tflops", "tokens"):
        if getattr(arguments, name) <= 0:
            raise UsageError(f"--{name} {getattr(arguments, name)}: must be above 0")
    if min(arguments.world_size) < 1:
        raise UsageError(f"--world_size {min(arguments.world_size)}: at least 1")
    return arguments


def row(engine: str, ranks: int, planned, flops: float, arguments: Namespace) -> str:
    """One line of the table."""
    rate = arguments.tflops * 1e12
    speed = (arguments.node_bandwidth if ranks <= arguments.gpus_per_node else arguments.bandwidth) * 1e9
    is_local = engine == "ddp" or ranks <= arguments.gpus_per_node  # DDP shares the optimizer's work within a node
    own_speed = (arguments.node_bandwidth if is_local else arguments.bandwidth) * 1e9
    optimizer = planned.optimizer_flops / rate + planned.optimizer_bytes / own_speed
    step = optimizer + flops / rate + planned.model_bytes / speed
    cells = (engine, f"{ranks:,}", f"{planned.optimizer_flops / 1e9:.1f}", f"{planned.optimizer_bytes / 1e6:.1f}",
             f"{planned.model_bytes / 1e6:.1f}", f"{planned.memory / 2**20:.0f}",
             f"{optimizer / step:.1%}")  # fmt: skip
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    run_script(main)
