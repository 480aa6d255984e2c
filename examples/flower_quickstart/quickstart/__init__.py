"""A stock Flower app, with fedq's codecs."""
