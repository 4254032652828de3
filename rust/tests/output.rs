//! Where the lines that workers write end, and what is kept of those that are written over.

use bytes::BytesMut;
use skyward_lite::node::stdio::{Sent, overwrite, take_back, whole_lines};

/// Only the last state of a line that is written over is kept, whether `\r` stands before each state or behind it.
#[test]
fn a_line_that_is_written_over_is_its_last_state() {
    for (written, kept) in [
        ("one\rtwo\rthree", "\rthree"),
        ("\r 10%\r 20%", "\r 20%"),
        ("10%\r20%\r", "\r20%\r"),
        ("10%\r", "10%\r"),
        ("\r\r", "\r\r"),
        ("\r1\r2\n\r3", "\r2\n\r3"),
        ("plain", "plain"),
        ("", ""),
    ] {
        let mut text = BytesMut::from(written);
        overwrite(&mut text);
        assert_eq!(text, kept.as_bytes(), "{written:?}");
    }
}

/// Bars below the first one are states of the same line: their newlines are taken back.
#[test]
fn bars_below_one_another_are_one_line() {
    for (written, one) in [
        ("\r a\n\r b\x1b[A\r a2", "\r a\r\r b\r\r\r\r a2"),
        ("\n\n\r c\x1b[A\x1b[A", "\r\r\r c\r\r\r\r\r\r"),
        ("done\n\n\r b\x1b[A", "done\n\r\r b\r\r\r"),
        ("\x1b[A", "\r\r\r"),
        ("a\x1b[A\nb\x1b[A", "a\r\r\r\rb\r\r\r"),
        ("\n\x1b[", "\n\x1b["),
    ] {
        let mut text = BytesMut::from(written);
        take_back(&mut text);
        assert_eq!(text, one.as_bytes(), "{written:?}");
    }
}

/// The end of a line that was written over is waited for what may take it back; any other is an end.
#[test]
fn ends_that_may_be_taken_back_are_held_back() {
    for (text, line, whole) in [
        ("one\ntwo\nth", Sent::Whole, 8),
        ("one\n", Sent::Whole, 4),
        ("dos\r\n", Sent::Whole, 5),
        ("one\n\r1%\r2%\n", Sent::Whole, 4),
        ("\r2%\n\n\r3%", Sent::Whole, 0),
        ("\r2%\nnext", Sent::Whole, 4),
        ("\n", Sent::Whole, 1),
        ("\n", Sent::Beginning, 1),
        ("\n", Sent::State, 0),
        ("", Sent::Whole, 0),
    ] {
        assert_eq!(whole_lines(text.as_bytes(), line), whole, "{text:?} after {line:?}");
    }
}
