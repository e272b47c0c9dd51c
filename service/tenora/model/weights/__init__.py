"""How frozen matrices lie in memory and are multiplied: a file for each kind, and `kinds.KINDS` names them all."""
