"""The errors of the engine side. Each message is one line that says what was found, and what to do about it."""


class EngineError(RuntimeError):
    """The inference engine cannot do what was asked, and asking again would not help."""


class ServerUnreachableError(EngineError):
    """Nothing answers at the server's address."""


class ServerMismatchError(EngineError):
    """A server answers, but it is not the one that this run needs: its model, tokenizer, context or routes differ."""


class ServerUnauthorizedError(EngineError):
    """The server wants an API key that was not given, or refuses the one that was."""


class WeightSyncError(EngineError):
    """The server does not provably hold the weights that it was sent."""
