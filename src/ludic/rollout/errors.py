"""The errors of the engine side. Each message is one line that says what was found, and what to do about it."""


class EngineError(RuntimeError):
    """The inference engine cannot do what was asked, and asking again would not help."""


class RouteMissingError(EngineError):
    """The server answers, and does not have the route: it is not ludic's, or of another version."""


class ServerLostError(EngineError):
    """The server that the run had is gone, silent, or another one by now. `recovery` gets it, or a new one, back."""


class ServerUnreachableError(ServerLostError):
    """Nothing answers at the server's address."""


class ServerRestartedError(ServerLostError):
    """The server was started again since it was given the weights: it holds those that it was started with."""


class ServerMismatchError(EngineError):
    """A server answers, but it is not the one that this run needs: its model, tokenizer, context or routes differ."""


class ServerUnauthorizedError(EngineError):
    """The server wants an API key that was not given, or refuses the one that was."""


class ServerInUseError(EngineError):
    """Another trainer has the server; the message says who."""


class WeightSyncError(ServerLostError):
    """The server does not provably hold the weights that it was sent: what it generates is not to be trained on."""
