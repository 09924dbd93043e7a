"""The engine: config -> plan -> executor -> writer, from files to files or from memory to memory, in bounded memory."""
