"""Does averaging make models better? Contenders trained side by side, and what to make of them."""
