"""How a run outlives what ends others: a lost server, a signal, a resume."""
