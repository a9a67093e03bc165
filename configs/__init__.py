"""Values (YAML), the one module that reads them, the clock and the command line. Imports no other package of the project."""
