"""fastmerge inside the tools that people already use: one module for each. Importing one never imports its tool."""
