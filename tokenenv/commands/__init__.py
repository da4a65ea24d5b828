"""What the commands of the command line do; :mod:`tokenenv.cli` reads their options."""
