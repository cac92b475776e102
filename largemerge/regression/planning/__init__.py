"""How much memory and time a regression merge takes, from plain numbers, and the placement that fits."""
