"""The Flower ClientApp of a fedq device: one message per round, the same in every runtime.

Flower loads ``app`` from here, in simulation (``flwr run .``) and on a device
(``flower-supernode``). All it does is in :mod:`fedq.client`.
"""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedq.node import client_of

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on local data and reply with an encoded delta."""
    return client_of(context).train(message, context)
