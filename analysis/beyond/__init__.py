"""Analysis that is not in the paper: forecasts of larger models, monitoring of a run, other schedule laws."""
