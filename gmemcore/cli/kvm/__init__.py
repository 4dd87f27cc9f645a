"""``gmemcore kvm``: the host's kernel instead of the model; one module per subcommand."""

from cyclopts import App

app = App(name="kvm", help="Ask the host's kernel (/dev/kvm), and hold it to the model.")
for _command in ("probe", "conform", "fuzz", "table", "bench"):
    app.command(f"gmemcore.cli.kvm.{_command}:{_command}", name=_command)
