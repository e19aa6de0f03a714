"""An OpenAI-compatible service over HTTP: rank 0 takes requests, all ranks follow its orders."""
