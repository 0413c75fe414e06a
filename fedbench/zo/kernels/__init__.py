"""The inner loops of the engine: keyed random directions, made where they are used and never stored."""
