"""Draw the spectral figures of a run from its log alone.

python scripts/track_manifold.py --plot_only [--run results/NAME] [--output_dir results/research_plots/NAME]
"""

import argparse
from pathlib import Path

from blueberry.errors import OneLineParser, UsageError, run_script
from blueberry.spectral.log import FOLDER

RESULTS = Path("results")


def newest_run(results: Path) -> Path:
    """The run folder under `results` whose spectral log was written to last."""
    logs = [log for log in results.glob(f"*/{FOLDER}") if log.is_dir()]
    if not logs:
        raise UsageError(f"no spectral log under {results}/: train with --track_manifold true, or pass --run")
    return max(logs, key=lambda log: log.stat().st_mtime_ns).parent


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot_only", action="store_true", required=True, help="draw from the log, train nothing")
    parser.add_argument("--run", type=Path, help="run folder (default: the newest under results/ with a spectral log)")
    parser.add_argument("--output_dir", type=Path, help="default: results/research_plots/<name of the run>")
    parser.add_argument("--formats", nargs="+", default=["png", "pdf"], choices=["png", "pdf", "svg"])
    return parser.parse_args()


def main() -> None:
    """Draw, and say where the figures are."""
    settings = parse_arguments()
    run = settings.run or newest_run(RESULTS)
    if not run.is_dir():
        raise UsageError(f"no run folder {run}; --run takes the output folder of a training run")
    from blueberry.spectral.plots import draw_run

    output_dir = settings.output_dir or RESULTS / "research_plots" / run.resolve().name
    try:
        figures = draw_run(run, output_dir, settings.formats)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UsageError(f"--output_dir {output_dir}: {error.strerror}; name a folder that can be written") from error
    print(f"{len(figures)} figures of {run} in {output_dir}")


if __name__ == "__main__":
    run_script(main)
