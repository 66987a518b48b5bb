"""Pictures, tables and commands on top of analysis/, and the notebooks."""
