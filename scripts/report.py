"""What the experiments found, from their records alone: tables, verdicts on the original claims, figures.

    python scripts/report.py [--results results/experiments/cpu]

Writes report.md, report.html and report.json (`{"claims": [{"id", "verdict", "n", "interval", "commit", ...}]}`)
there, and redraws the figures. The rule for a verdict is in `experiments/claims.py`. Results that do not belong
together (a record that is missing, other seeds, another config) are refused.
"""

import argparse
import dataclasses
from collections import Counter
from pathlib import Path

import markdown
from experiments.claims import CHANGES, OWN_THRESHOLDS, Claim, judged
from experiments.drawings import draw
from experiments.intervals import FAILS, HOLDS, IN_WORDS, OPEN
from experiments.measures import markdown as table
from experiments.measures import quoted
from experiments.stored import read_baseline, read_results
from experiments.stretching import stretching_report

from blueberry.errors import OneLineParser, UsageError, run_script
from blueberry.training.run_folder import write_json

EXPERIMENTS = {
    "experiment_1": "Muon against AdamW",
    "experiment_2": "Muon without its parts",
    "experiment_3": "Sensitivity to settings",
    "experiment_4": "What Newton-Schulz costs",
    "experiment_5": "Manifold Muon",
    "experiment_6": "Variants of Muon",
}
STYLE = ("body {font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em} img {max-width: 100%} "
         "table {border-collapse: collapse} td, th {border: 1px solid #ccc; padding: 0.2em 0.6em}")  # fmt: skip


def main() -> None:
    folder = parse_arguments().results
    done = [name for name in EXPERIMENTS if read_results(folder, name) is not None]
    if not done:
        raise UsageError(f"{folder} holds no results: run scripts/experiment_1_baseline_comparison.py first")
    claims = judged(folder)
    for name in done:
        draw(name, folder)
    write_json(folder / "report.json", {"claims": [as_json(claim) for claim in claims]})
    text = "\n".join([*summary(claims, done), *stretching(folder), *sections(folder, done)])
    (folder / "report.md").write_text(text)
    (folder / "report.html").write_text(as_html(text))
    for claim in claims:
        print(f"{IN_WORDS[claim.verdict]:14} {claim.text}")
    print(f"\n{folder / 'report.md'}, report.html, report.json")


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results/experiments/cpu"))
    return parser.parse_args()


def as_json(claim: Claim) -> dict:
    """The numbers of the model that decides stand for the claim; all of them are in `findings`."""
    findings = [dataclasses.asdict(finding) | {"verdict": finding.verdict} for finding in claim.findings]
    deciding = dataclasses.asdict(claim.deciding) if claim.deciding else {"n": 0}
    numbers = {name: deciding.get(name) for name in ("model", "n", "interval", "commit")}
    return {"id": claim.id, "text": claim.text, "verdict": claim.verdict, **numbers, "findings": findings}


def summary(claims: list[Claim], done: list[str]) -> list[str]:
    rows = []
    for claim in claims:
        for finding in claim.findings:
            low, high = finding.interval
            rows.append([claim.id.split("_")[0], claim.text, finding.model, finding.measure,
                         f"{finding.value:.4g} [{low:.4g}, {high:.4g}]", finding.n, finding.note,
                         IN_WORDS[finding.verdict]])  # fmt: skip
        if not claim.findings:
            rows.append([claim.id.split("_")[0], claim.text, "", "not measured", "", 0, "", IN_WORDS[claim.verdict]])
    header = ["claim", "", "model", "measure", "mean, 95% interval", "n", "", "verdict"]
    verdicts = Counter(claim.verdict for claim in claims)
    missing = [title for name, title in EXPERIMENTS.items() if name not in done]
    return [
        "# What the experiments found\n",
        "A claim holds if the whole 95% interval over seeds satisfies it, does not hold if the whole interval "
        "violates it, and is not decided otherwise; a bound on all that was seen does not hold if anything lies "
        "outside. On several models it holds if it holds on each, and does not hold if it fails on one. The "
        "originals' twelve claims are parted into the statements below. "
        f"{OWN_THRESHOLDS} Intervals and p-values are not corrected for the number of statements.\n",
        table(header, rows),
        f"Of {len(claims)} statements {verdicts[HOLDS]} hold, {verdicts[FAILS]} do not, {verdicts[OPEN]} are not "
        "decided.\n",
        "The rule was committed before the runs that it judges. Altered after their results were known:\n",
        "\n".join(f"- {change}" for change in CHANGES) + "\n",
        f"Not run: {', '.join(missing)}.\n" if missing else "",
    ]


def stretching(folder: Path) -> list[str]:
    """The report on hierarchical stretching, from the spectral logs of experiment 1."""
    parts = []
    for model, comparison in read_baseline(folder).items():
        parts += [stretching_report(model, comparison), quoted(comparison.arms) + "\n"]
    return ["## Hierarchical stretching\n", *parts] if parts else []


def sections(folder: Path, done: list[str]) -> list[str]:
    """Tables and figures that the experiments left."""
    parts = []
    for name in done:
        parts.append(f"## {EXPERIMENTS[name]}\n")
        for page in sorted((folder / name).glob("*.md")):
            parts += [f"### {page.stem}\n", page.read_text()]
        for figure in sorted((folder / name).rglob("*.png")):
            parts.append(f"![{figure.stem}]({figure.relative_to(folder)})\n")
    return parts


def as_html(text: str) -> str:
    """The report as a page; its figures lie beside it."""
    body = markdown.markdown(text, extensions=["tables"])
    return f"<!doctype html><meta charset='utf-8'><title>Experiments</title><style>{STYLE}</style>{body}"


if __name__ == "__main__":
    run_script(main)
