"""The average: of the weights, of the moving statistics, and of both in the model for a while."""
