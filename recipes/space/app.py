"""The app as a Space of the Hub: visitors attack the demo models, and bring pictures, not models."""

from hf_robust_vision.app.serve import serve


if __name__ == "__main__":
    serve(host="0.0.0.0", port=7860)
