"""The `rfkernels` command: one file per subcommand, main.py around them, and what they share (drawing from a run,
quality, pictures, the report, output, options)."""
