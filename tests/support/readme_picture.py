"""The picture of the README's first screen: ``tests/support/readme_picture.py --write`` draws it again.

Left: page states of a guest after a boot and some churn. Right: where a workload that asks for PRESERVE is
refused. Both follow from seeds: nothing in them is a figure of one machine.
"""

import sys
import tempfile
from contextlib import redirect_stdout
from io import BytesIO
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from PIL import Image

import gmemcore
from gmemcore.analysis import page_map, read_run, refusal_map, take
from gmemcore.cli import main
from gmemcore.workload.behaviours import BEHAVIOURS
from gmemcore.workload.layout import Layout
from gmemcore.workload.player import build, play
from gmemcore.workload.streams import concatenate, limit

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "notebooks" / "pictures" / "first_look.png"
TRACE = ROOT / "notebooks" / "examples" / "churn.jsonl"


def guest():
    """An SNP guest of 4 GiB after its boot, and while buffers come and go in 6 % of its memory."""
    vm = gmemcore.create_vm("SNP", "v5", backing="none")
    layout = Layout.single(4 << 30, private=True)
    build(vm, layout)
    boot = BEHAVIOURS["snp-boot"].operations(layout, seed=1, accepted=0.5)
    churn = BEHAVIOURS["bounce-churn"].operations(layout, seed=2, buffer="2m")
    play(vm, concatenate(boot, limit(churn, 4000)))
    return vm


def refusals():
    """The trace of the worked examples under every revision, asking for PRESERVE of a firmware that could."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "replay.jsonl"
        with path.open("w") as file, redirect_stdout(file):
            try:
                asked = ["--all-abis", "--flags", "preserve", "--firmware", "cipher"]
                main(["replay", str(TRACE), *asked, "--json"])
            except SystemExit as stopped:
                if stopped.code:
                    raise
        return read_run(path)


def draw():
    """The figure."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, 4.8), layout="constrained", width_ratios=(1.05, 1)
    )
    page_map(take(guest(), label="SNP after boot and churn"), left, order="hilbert").spines[:].set_visible(
        False
    )
    refusal_map(refusals(), right).set_title(
        "Conversions refused: PRESERVE, and a firmware that could", loc="left", pad=12
    )
    return figure


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/support/readme_picture.py --write")
    drawn = BytesIO()
    draw().savefig(drawn, dpi=110)
    Image.open(drawn).convert("RGB").quantize(128).save(PICTURE, optimize=True)
    print(f"{PICTURE.name}: {PICTURE.stat().st_size >> 10} KiB")
