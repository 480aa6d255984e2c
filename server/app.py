"""The Flower ServerApp: ``flwr run . --run-config 'hydra="rounds=20 codec.bits=4"'``.

All it does is in :mod:`fedq.server`.
"""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedq.node import serve

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the run's configuration describes."""
    serve(grid, context)
