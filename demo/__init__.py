"""The demo: a family of small real models, merged from YAML files and scored on text that none of them has seen."""
