"""The app: a picture, a model and its hardened twin under attack, in a browser. Only the command line imports it."""
