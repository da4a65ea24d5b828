"""What the commands of the command line do; :mod:`tokenenv.cli.main` reads their options."""
