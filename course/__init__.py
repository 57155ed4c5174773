"""What a course needs beside the chapters; see `course.editions`."""
