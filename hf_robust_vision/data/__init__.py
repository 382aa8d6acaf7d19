"""Images in [0, 1] with labels and ids: folders, `datasets`, and the offline demo."""
