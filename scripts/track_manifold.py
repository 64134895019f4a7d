"""Draw the spectral figures of runs from their logs, or analyse finished models.

python scripts/track_manifold.py --plot_only [--run results/NAME]
python scripts/track_manifold.py --compare results/MUON results/ADAMW
python scripts/track_manifold.py --compare results/MUON_1,results/MUON_2 results/ADAMW_1,results/ADAMW_2   (seeds)
python scripts/track_manifold.py --model PATH_OR_HUB_ID                    (also ID@REVISION)
python scripts/track_manifold.py --model results/NAME                      (its checkpoint-* as steps)

Figures and, with --report, report.html go to results/research_plots/<name>, of models to model_<name> together with
their log (or --output_dir).
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from blueberry.errors import OneLineParser, UsageError, run_script
from blueberry.spectral.log import FOLDER, SpectralLog

RESULTS = Path("results")


def main() -> None:
    """Read or analyse, draw, and say where the figures are."""
    settings = parse_arguments()
    if settings.model:
        from checkpoint_series import analyze_series

        name = "model_" + "_".join(Path(model).name for model in settings.model[:2])
        output_dir = settings.output_dir or RESULTS / "research_plots" / name
        how = {name: vars(settings)[name] for name in ("exact", "power_law", "workers")}
        analyze_series(settings.model, SpectralLog(output_dir / FOLDER), **how)
        runs: dict[str, list[Path]] = {name: [output_dir]}
    else:
        runs = runs_of(settings)
        output_dir = settings.output_dir or RESULTS / "research_plots" / "_vs_".join(runs)
    show(read(runs), " and ".join(runs), output_dir, settings)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    usage, _, more = __doc__.partition("\n\n")
    parser = OneLineParser(description=usage, epilog=more, formatter_class=argparse.RawTextHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--plot_only", action="store_true", help="the run --run, from its log alone")
    what.add_argument("--compare", nargs="+", metavar="RUN", help="runs side by side; seeds of one joined by commas")
    what.add_argument("--model", nargs="+", help="folders or Hub ids of models, or runs with checkpoints")
    parser.add_argument("--run", help="run folder, or seeds of one joined by commas (default: the newest in results/)")
    parser.add_argument("--output_dir", type=Path, help="default: results/research_plots/<name of the run>")
    parser.add_argument("--formats", nargs="+", default=["png", "pdf"], choices=["png", "pdf", "svg"])
    parser.add_argument("--report", action="store_true", help="also report.html (needs: pip install plotly)")
    parser.add_argument("--exact", action="store_true", help="--model by SVDs in double precision")
    parser.add_argument("--power_law", action="store_true", help="--model with the exponents of tails")
    parser.add_argument("--workers", type=int, default=1, help="--model: threads, and tensors in memory (default: 1)")
    settings = parser.parse_args()
    if settings.workers < 1:
        raise UsageError(f"--workers {settings.workers}: at least 1")
    return settings


def runs_of(settings: argparse.Namespace) -> dict[str, list[Path]]:
    """Name of each run -> the folders of its seeds."""
    wanted = settings.compare or [settings.run or str(newest_run(RESULTS))]
    runs = {}
    for seeds in wanted:
        folders = [Path(folder) for folder in seeds.split(",")]
        for folder in folders:
            if not folder.is_dir():
                raise UsageError(f"no run folder {folder}: give the output folder of a training run")
        name = folders[0].resolve().name
        runs[name if name not in runs else str(folders[0]).replace("/", "_")] = folders
    return runs


def newest_run(results: Path) -> Path:
    """The run folder under `results` whose spectral log was written to last."""
    logs = [log for log in results.glob(f"*/{FOLDER}") if log.is_dir()]
    if not logs:
        raise UsageError(f"no spectral log under {results}/: train with --track_manifold true, or pass --run")
    return max(logs, key=lambda log: log.stat().st_mtime_ns).parent


def read(runs: Mapping[str, Sequence[Path]]) -> pd.DataFrame:
    """The logs of all runs and seeds as one."""
    from blueberry.spectral.plots import combined

    return combined({name: [SpectralLog(seed / FOLDER).read() for seed in seeds] for name, seeds in runs.items()})


def show(log: pd.DataFrame, title: str, output_dir: Path, settings: argparse.Namespace) -> None:
    """Figures, and the report."""
    from blueberry.spectral.plots import draw

    try:
        figures = draw(log, output_dir, settings.formats)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UsageError(f"--output_dir {output_dir}: {error.strerror}; name a folder that can be written") from error
    print(f"{len(figures)} figures of {title} in {output_dir}")
    if settings.report:
        from blueberry.spectral.report import write_report

        path = write_report(log, f"Spectra of {title}", output_dir / "report.html")
        print(f"report {path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    run_script(main)
