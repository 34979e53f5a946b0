"""What tests share: processes, servers, files and plugins that they make."""
