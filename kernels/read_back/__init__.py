"""What vectors read as once they have been stored in fewer bits."""
