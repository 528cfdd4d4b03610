"""The `mhc` command."""
import typer
app = typer.Typer()
