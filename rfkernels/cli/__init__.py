"""The `rfkernels` command: one file per subcommand, main.py around them, and what they share (quality,
pictures, plots, reports, output, options)."""
