"""Terminal output: progress, tables and help; redaction of secrets; streams and signals of a process."""
