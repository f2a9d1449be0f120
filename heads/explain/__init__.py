"""Why a head chose: relevance of pixels, and what is done with it."""
