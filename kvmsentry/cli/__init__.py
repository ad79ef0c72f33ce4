"""The command line. Only this floor imports click."""
