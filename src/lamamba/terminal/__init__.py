"""What commands print: standard streams, lines, tables and progress bars."""
