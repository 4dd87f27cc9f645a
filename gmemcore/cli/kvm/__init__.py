"""``gmemcore kvm``: the host's kernel instead of the model; one module per subcommand."""

from cyclopts import App

from gmemcore.cli.kvm.bench import bench
from gmemcore.cli.kvm.conform import conform
from gmemcore.cli.kvm.fuzz import fuzz
from gmemcore.cli.kvm.probe import probe
from gmemcore.cli.kvm.table import table

app = App(name="kvm", help="Probe, fuzz and measure the host's KVM (/dev/kvm); compare it with the model.")
for _command in (probe, conform, fuzz, table, bench):
    app.command(_command)
