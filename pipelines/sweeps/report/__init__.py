"""What a sweep showed: statistics, sentences, pictures and the page that holds them."""
