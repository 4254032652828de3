//! The bytes that decide what happens. When they are used up, all further ones are 0.

pub struct Script<'a> {
    left: &'a [u8],
    /// How much more rarely than it is asked for something is broken; `None`: never.
    calm: Option<u8>,
}

impl<'a> Script<'a> {
    /// The first byte says how broken the peers are.
    pub fn new(bytes: &'a [u8]) -> Self {
        let mut script = Self { left: bytes, calm: None };
        script.calm = [Some(1), Some(6), Some(40), None][script.below(4)];
        script
    }

    pub fn is_over(&self) -> bool {
        self.left.is_empty()
    }

    pub fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.left.split_first() else { return 0 };
        self.left = rest;
        first
    }

    pub fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (now, later) = self.left.split_at(count.min(self.left.len()));
        self.left = later;
        now
    }

    /// Return some of the next bytes, fewer than `most`.
    pub fn some(&mut self, most: usize) -> &'a [u8] {
        let count = self.below(most);
        self.bytes(count)
    }

    pub fn u64(&mut self) -> u64 {
        let mut number = [0; 8];
        let bytes = self.bytes(8);
        number[..bytes.len()].copy_from_slice(bytes);
        u64::from_le_bytes(number)
    }

    /// Return one of the numbers below `count`; 0 if there are none.
    pub fn below(&mut self, count: usize) -> usize {
        usize::from(self.byte()) % count.max(1)
    }

    /// Return true once in `times`.
    pub fn rarely(&mut self, times: u8) -> bool {
        self.byte() % times == times - 1
    }

    /// Return whether something is broken that may be: once in `times`, or more rarely, or never.
    pub fn breaks(&mut self, times: u8) -> bool {
        match self.calm {
            Some(1) => self.rarely(times),
            Some(calm) => self.rarely(times) && self.rarely(calm),
            None => false,
        }
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> Option<T> {
        let at = self.below(from.len());
        from.get(at).copied()
    }
}
