"""The methods of training: a record for each, and the options of all."""
