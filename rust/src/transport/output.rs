//! What a command that was run to its end leaves, and how a command is named in errors. Each kind of connection makes it.

/// Bytes that are stored of each stream of a command that is run to its end; what follows is read and dropped.
pub const MAX_OUTPUT: usize = 1024 * 1024;

/// What a command left when it ended.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct CommandOutput {
    /// Its exit status; `None` if a signal or the end of the connection ended it.
    pub status: Option<u32>,
    /// The first [`MAX_OUTPUT`] bytes of its standard output.
    pub stdout: Vec<u8>,
    /// The first [`MAX_OUTPUT`] bytes of its standard error.
    pub stderr: Vec<u8>,
}

/// Append as much of `data` as fits into [`MAX_OUTPUT`] bytes.
pub(super) fn append_capped(stored: &mut Vec<u8>, data: &[u8]) {
    let room = MAX_OUTPUT.saturating_sub(stored.len()).min(data.len());
    stored.extend_from_slice(data.get(..room).unwrap_or_default());
}

/// Return the part of a command that errors show: the text after the last " -- ", or all of it. The text before " -- " is
/// our own check of the host, which tells a reader nothing.
pub(crate) fn shown(command: &str) -> &str {
    command.rsplit_once(" -- ").map_or(command, |(_, program)| program)
}
