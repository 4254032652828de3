//! A machine behind a command of this machine whose standard input and output reach a shell there: `docker exec`,
//! `kubectl exec`, `srun`. Each command that is run there is a process here.
//!
//! A process is never left behind: when its stream is dropped its input is closed, and its process group is ended by
//! SIGTERM, at last by SIGKILL. SIGTERM comes first and gets time because `srun` ends its job step then; after SIGKILL the
//! step would live on.

use std::future::Future;
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::pin::Pin;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf};
use tokio::net::unix::pipe;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::error::SshError;
use crate::locks::{lock, wait_timeout_while};
use crate::text;
use crate::transport::output::{CommandOutput, append_capped};

/// How long a process whose input was closed may take to end by itself.
const CLOSED_TIMEOUT: Duration = Duration::from_millis(100);
/// How long a process may take to end after SIGTERM.
const TERM_TIMEOUT: Duration = Duration::from_secs(3);
/// How long the output of a process that has ended is read on, which other processes may still have open; and for how long
/// the end of a process is waited for whose output has ended.
const LINGER_TIMEOUT: Duration = Duration::from_secs(1);
/// Bytes of a process's standard error that are kept for the error that tells of its end.
const TAIL_BYTES: usize = 2048;
/// Bytes of the stack of a thread that only waits for a process.
const STACK_BYTES: usize = 64 * 1024;
/// Bytes per read of standard error.
const READ_BYTES: usize = 4096;

/// See the file's text.
#[derive(Debug, Clone)]
pub struct CommandConnection {
    /// The program and its arguments; the shell's command line comes behind them.
    words: Vec<String>,
    /// All variables of its environment; `None` for our own.
    environment: Option<Vec<(String, String)>>,
    /// The processes that are being ended.
    ending: Ending,
}

impl CommandConnection {
    /// `words`: the program and its arguments, but for the last one, which is what the shell there is to run.
    #[must_use]
    pub fn new(words: Vec<String>, environment: Option<Vec<(String, String)>>, ending: Ending) -> Self {
        Self { words, environment, ending }
    }

    /// Return the command as it is shown.
    #[must_use]
    pub fn shown(&self) -> String {
        text::line(self.words.join(" "), text::LIMIT)
    }

    /// Start the process that runs a shell's command line there.
    fn start(&self, line: &str) -> Result<Started, SshError> {
        let (program, arguments) =
            self.words.split_first().map_or(("", &[][..]), |(first, rest)| (first.as_str(), rest));
        let mut command = Command::new(program);
        command.args(arguments).arg(line).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // A group of its own: Ctrl-C at a terminal is for this process, which then ends the nodes in order.
        command.process_group(0);
        if let Some(environment) = &self.environment {
            command.env_clear().envs(environment.iter().map(|(name, value)| (name, value)));
        }
        let not_started = |error| SshError::Program { program: text::line(program, text::LIMIT), error };
        let mut child = command.spawn().map_err(not_started)?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let running = Running(Process::follow(child).map_err(not_started)?, self.ending.clone());
        let (Some(stdin), Some(stdout), Some(stderr)) = (stdin, stdout, stderr) else {
            return Err(not_started(io::ErrorKind::BrokenPipe.into()));
        };
        Ok(Started {
            stdin: pipe::Sender::from_owned_fd(stdin.into()).map_err(not_started)?,
            stdout: pipe::Receiver::from_owned_fd(stdout.into()).map_err(not_started)?,
            stderr: pipe::Receiver::from_owned_fd(stderr.into()).map_err(not_started)?,
            running,
        })
    }

    /// Start a command there, and return its standard output and input. When its output has ended, reading is an error that
    /// tells how the process ended, and what it printed to standard error. Must be called inside a Tokio runtime.
    ///
    /// # Errors
    /// [`SshError::Program`] if the process cannot be started.
    pub fn exec(&self, line: &str) -> Result<(CommandReader, pipe::Sender), SshError> {
        let Started { stdin, stdout, stderr, running } = self.start(line)?;
        let tail = Arc::<Mutex<Vec<u8>>>::default();
        let printing = tokio::spawn(keep_tail(stderr, Arc::clone(&tail)));
        let ending = why_ended(running, printing, tail);
        Ok((CommandReader { stdout, has_ended: false, ending: Some(Box::pin(ending)) }, stdin))
    }

    /// Run a command there to its end, with `input` as its standard input. `output` has what it has printed, as it comes.
    ///
    /// # Errors
    /// [`SshError::Program`] if the process cannot be started.
    pub async fn run_into(&self, line: &str, input: Bytes, output: &Mutex<CommandOutput>) -> Result<(), SshError> {
        let Started { mut stdin, mut stdout, mut stderr, running } = self.start(line)?;
        let send = async {
            // A command that has ended takes no more input, and its status tells the reason.
            drop(stdin.write_all(&input).await);
            drop(stdin);
            std::future::pending::<()>().await;
        };
        let receive = async {
            tokio::join!(
                collect(&mut stdout, |data| append_capped(&mut lock(output).stdout, data)),
                collect(&mut stderr, |data| append_capped(&mut lock(output).stderr, data)),
            )
        };
        let (mut send, mut receive) = (std::pin::pin!(send), std::pin::pin!(receive));
        let (mut end, mut has_all) = (None, false);
        while end.is_none() || !has_all {
            tokio::select! {
                ended = running.0.ended(), if end.is_none() => end = Some(ended),
                _ = &mut receive, if !has_all => has_all = true,
                () = &mut send => {}
                // What the process has started may keep its output open.
                () = tokio::time::sleep(LINGER_TIMEOUT), if end.is_some() => break,
            }
        }
        lock(output).status = end.and_then(|End(status)| status?.code()).and_then(|code| u32::try_from(code).ok());
        Ok(())
    }
}

/// A process that was just started, and its streams.
struct Started {
    stdin: pipe::Sender,
    stdout: pipe::Receiver,
    stderr: pipe::Receiver,
    running: Running,
}

async fn collect(from: &mut pipe::Receiver, mut take: impl FnMut(&[u8])) {
    let mut data = vec![0; READ_BYTES * 16];
    while let Ok(count @ 1..) = from.read(&mut data).await {
        take(data.get(..count).unwrap_or_default());
    }
}

async fn keep_tail(mut stderr: pipe::Receiver, tail: Arc<Mutex<Vec<u8>>>) {
    let mut data = [0; READ_BYTES];
    while let Ok(count @ 1..) = stderr.read(&mut data).await {
        let mut tail = lock(&tail);
        tail.extend_from_slice(data.get(..count).unwrap_or_default());
        let excess = tail.len().saturating_sub(TAIL_BYTES);
        tail.drain(..excess);
    }
}

/// How a process has ended; `None` inside if that is not known, as in a program that ignores SIGCHLD.
#[derive(Debug, Clone, Copy)]
struct End(Option<ExitStatus>);

/// A process of ours, and how it has ended.
#[derive(Debug)]
struct Process {
    /// It leads a process group of its own.
    pid: Option<Pid>,
    /// `None` while it runs. The process is reaped under this lock, so that its number is its own as long as this is `None`.
    end: Mutex<Option<End>>,
    changed: Condvar,
    notify: Notify,
}

impl Process {
    /// Have a thread wait for the process's end. Not Tokio's own processes, which take the program's SIGCHLD on some systems.
    ///
    /// # Errors
    /// If there can be no further thread. The process is ended then, as nothing would learn of its end.
    fn follow(mut child: Child) -> io::Result<Arc<Self>> {
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let process = Arc::new(Self { pid, end: Mutex::default(), changed: Condvar::new(), notify: Notify::new() });
        let followed = Arc::clone(&process);
        let wait = std::thread::Builder::new().name("skyward-process".to_owned()).stack_size(STACK_BYTES);
        wait.spawn(move || followed.wait_for(&mut child)).inspect_err(|_| process.signal(Signal::KILL))?;
        Ok(process)
    }

    fn wait_for(&self, child: &mut Child) {
        if let Some(pid) = self.pid {
            // It is left to be reaped below.
            let look = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            while matches!(waitid(WaitId::Pid(pid), look), Err(rustix::io::Errno::INTR)) {}
        }
        *lock(&self.end) = Some(End(child.wait().ok()));
        self.changed.notify_all();
        self.notify.notify_waiters();
    }

    /// Wait until the process has ended.
    async fn ended(&self) -> End {
        loop {
            let changed = self.notify.notified();
            if let Some(end) = *lock(&self.end) {
                return end;
            }
            changed.await;
        }
    }

    /// Send a signal to the process's group, if the process has not ended.
    fn signal(&self, signal: Signal) {
        let end = lock(&self.end);
        if let (None, Some(pid)) = (*end, self.pid) {
            // The group is gone if all of it has ended just now.
            let _ = kill_process_group(pid, signal);
        }
    }

    /// Wait for the process's end. Return whether it has ended in time.
    fn has_ended_within(&self, bound: Duration) -> bool {
        wait_timeout_while(&self.changed, lock(&self.end), bound, |end| end.is_none()).is_some()
    }
}

/// The processes of a pool that are being ended, each by a thread of its own.
#[derive(Debug, Clone, Default)]
pub struct Ending(Arc<Mutex<Vec<Arc<Process>>>>);

impl Ending {
    /// Wait until all of them have ended, at most for `bound`, and end the others by force.
    pub fn finish(&self, bound: Duration) {
        let until = Instant::now() + bound;
        for process in std::mem::take(&mut *lock(&self.0)) {
            if !process.has_ended_within(until.saturating_duration_since(Instant::now())) {
                process.signal(Signal::KILL);
            }
        }
    }

    fn add(&self, process: &Arc<Process>) {
        let mut processes = lock(&self.0);
        processes.retain(|process| lock(&process.end).is_none());
        processes.push(Arc::clone(process));
    }
}

/// Ends its process when it is dropped.
#[derive(Debug)]
struct Running(Arc<Process>, Ending);

impl Drop for Running {
    fn drop(&mut self) {
        if lock(&self.0.end).is_some() {
            return;
        }
        self.1.add(&self.0);
        let process = Arc::clone(&self.0);
        let end = move || {
            // The streams are closed with this: most commands end of that.
            if process.has_ended_within(CLOSED_TIMEOUT) {
                return;
            }
            process.signal(Signal::TERM);
            if !process.has_ended_within(TERM_TIMEOUT) {
                process.signal(Signal::KILL);
            }
        };
        let thread = std::thread::Builder::new().name("skyward-end".to_owned()).stack_size(STACK_BYTES);
        if thread.spawn(end).is_err() {
            self.0.signal(Signal::TERM);
        }
    }
}

/// The standard output of a command that runs. Dropping it ends the process.
pub struct CommandReader {
    stdout: pipe::Receiver,
    /// Whether there is no further output.
    has_ended: bool,
    /// Waits for the process, once its output has ended. Owns the process. `None` when that has been told.
    ending: Option<Pin<Box<dyn Future<Output = io::Error> + Send>>>,
}

impl AsyncRead for CommandReader {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if !self.has_ended {
            let before = buf.filled().len();
            let read = ready!(Pin::new(&mut self.stdout).poll_read(cx, buf));
            if read.is_err() || buf.filled().len() > before {
                return Poll::Ready(read);
            }
            self.has_ended = true;
        }
        let Some(ending) = &mut self.ending else { return Poll::Ready(Ok(())) };
        let why = ready!(ending.as_mut().poll(cx));
        self.ending = None;
        Poll::Ready(Err(why))
    }
}

/// Return how a process has ended whose output has ended, as an error.
async fn why_ended(running: Running, printing: JoinHandle<()>, tail: Arc<Mutex<Vec<u8>>>) -> io::Error {
    let how = match tokio::time::timeout(LINGER_TIMEOUT, running.0.ended()).await {
        Ok(End(status)) => {
            drop(tokio::time::timeout(LINGER_TIMEOUT, printing).await);
            match (status.and_then(|s| s.code()), status.and_then(|s| s.signal())) {
                (Some(code), _) => format!("ended with status {code}"),
                (None, Some(signal)) => format!("was ended by signal {signal}"),
                (None, None) => "ended".to_owned(),
            }
        }
        Err(_) => "closed its output".to_owned(),
    };
    let printed = lock(&tail).clone();
    let printed = text::lines(printed.trim_ascii(), text::LIMIT);
    let printed = if printed.is_empty() { String::new() } else { format!("; it printed: {printed}") };
    io::Error::new(io::ErrorKind::UnexpectedEof, format!("the command {how}{printed}"))
}
