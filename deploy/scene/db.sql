CREATE DATABASE IF NOT EXISTS shop;
CREATE TABLE IF NOT EXISTS shop.orders (id INT AUTO_INCREMENT PRIMARY KEY, item VARCHAR(64) NOT NULL, amount INT NOT NULL);
-- No password: who may connect is decided by the agent, from the caller's certificate.
CREATE USER IF NOT EXISTS 'orders'@'%';
GRANT SELECT, INSERT ON shop.orders TO 'orders'@'%';
