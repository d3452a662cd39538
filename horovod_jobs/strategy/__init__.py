"""How the ranks' gradients become one update. A strategy is a class named by ``strategy._target_`` (see ``strategy.base``)."""
